"""Claims about the CUDA backend, stated once: run on a device, and on the CPU by the harness."""
