"""What a model loses to a compressed cache, measured: formats, divergences, sensitivities.

Needs torch and transformers (the ``transformers`` extra) for all but `formats`, `peer_formats` and
`settings`. ``pagedtq evaluate`` is its command.
"""
