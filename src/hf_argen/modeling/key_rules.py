"""Key rules that several families share."""

from .key_map import Rename, Rule, Split


def timm_block(theirs: str, ours: str, qkv: str = "{leaf}") -> list[Rule]:
    """
    A transformer layer in the naming of timm, which many authors keep.

    Args:
        theirs, ours: names of the layer.
        qkv: what the joint projection of queries, keys and values has, weight and bias unless only one is named.
    """
    parts = {
        "norm1": "input_layernorm",
        "attn.proj": "self_attn.o_proj",
        "norm2": "post_attention_layernorm",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    return [
        Split(f"{theirs}.attn.qkv.{qkv}", *(f"{ours}.self_attn.{part}_proj.{qkv}" for part in "qkv")),
        *(Rename(f"{theirs}.{part}.{{leaf}}", f"{ours}.{own}.{{leaf}}") for part, own in parts.items()),
    ]
