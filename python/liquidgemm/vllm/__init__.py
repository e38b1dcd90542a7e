"""Runs packed checkpoints, folders that `liquidgemm quantize` wrote, in vLLM. It is a plugin: vLLM finds it by itself.

```sh
pip install vllm 'liquidgemm[torch]'
vllm serve folder
```

| file | |
|---|---|
| `_names.py` | which of vLLM's layers are packed |
| `_shards.py` | gathers the matrices of a layer, cuts them for tensor parallelism and stacks them |
| `_config.py` | the quantization config |
| `_linear.py` | linear layers |
| `_moe.py` | mixtures of experts |
| `_kernel.py` | compressed-tensors checkpoints with int4 weights and int8 activations |

The first two know nothing of vLLM. Importing this package does not import vLLM; `register` does.
Checked against the sources of vLLM 0.33.0. It was not run in an engine: see the package's README.
"""

import logging

__all__ = ["register"]

_registered = False


def register() -> None:
    """Registers the quantization method and the kernel. vLLM calls it in each of its processes."""
    global _registered
    if _registered:
        return
    _registered = True
    try:
        from vllm.model_executor.layers.quantization import register_quantization_config

        from .._checkpoint import METHOD
        from ._config import LiquidGemmConfig
        from ._kernel import register_kernel
    except ImportError as error:
        # An exception here would stop vLLM also for models that have nothing to do with this package.
        logging.getLogger(__name__).warning(
            "liquidgemm does not fit this version of vLLM (%s), so packed folders do not load; "
            "install vLLM 0.33.0, or a liquidgemm that names your version",
            error,
        )
        return
    register_quantization_config(METHOD)(LiquidGemmConfig)
    register_kernel()
