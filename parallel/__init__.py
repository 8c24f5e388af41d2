"""The network of `inference/` on megatron-core: tensor, sequence, pipeline and data parallelism; CPU (gloo) or GPU (NCCL)."""
