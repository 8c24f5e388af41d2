"""The network of `inference/` on megatron-core: tensor, sequence, pipeline and data parallelism; CPU (gloo) or GPU (NCCL)."""

import logging
import warnings

# megatron-core says at each import which optional GPU packages are absent, and uses names that torch has since renamed;
# `parallel.layers` and `parallel.attention` say in the log which back ends were chosen
warnings.filterwarnings("ignore", module=r"megatron\.")
warnings.filterwarnings("ignore", message=r".*(Transformer Engine|Apex|cuda_graph_scope).*")
warnings.filterwarnings("ignore", message=r".*`torch\.distributed\.\w+` is deprecated")
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
