//! W4A8 GEMM for NVIDIA Hopper: 4-bit weights, 8-bit activations, exact integer accumulation.
