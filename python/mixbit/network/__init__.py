"""What a model is to mixbit: its layers in forward order, and how it is called."""

from mixbit.network.calling import (
    batch_size,
    call_model,
    check_batches,
    check_eval_mode,
    check_labels,
    check_truths,
    flatten_outputs,
    input_of,
)
from mixbit.network.graph import LAYER_OPS, PASS_OPS, Graph, Node, UnsupportedOperation, capture, run_node, run_pass
from mixbit.network.trace import (
    LAYER_MARK,
    FloatModule,
    Layer,
    LayerList,
    Shapes,
    batchnorm_pairs,
    conv_padding,
    is_quantizable,
    layers,
    quantizable_modules,
)

__all__ = [
    "LAYER_MARK",
    "LAYER_OPS",
    "PASS_OPS",
    "FloatModule",
    "Graph",
    "Layer",
    "LayerList",
    "Node",
    "Shapes",
    "UnsupportedOperation",
    "batch_size",
    "batchnorm_pairs",
    "call_model",
    "capture",
    "check_batches",
    "check_eval_mode",
    "check_labels",
    "check_truths",
    "conv_padding",
    "flatten_outputs",
    "input_of",
    "is_quantizable",
    "layers",
    "quantizable_modules",
    "run_node",
    "run_pass",
]
