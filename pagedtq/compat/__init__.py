"""Caches with the interfaces of two earlier Rust crates, on pages of this library.

`turboquant` follows the crate of that name (single- and multi-head caches of unit vectors),
`turbo_quant` the crate `turbo-quant` (a compressor with exact shadows). Semantics, defaults and
errors are theirs; codecs, pages and arithmetic are this library's, so no random stream and no byte
equals theirs.
"""
