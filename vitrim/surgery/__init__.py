"""The only code that changes modules: one file for each kind of edit, and the functions that apply edits."""

from vitrim.surgery.drop_blocks import DropBlocks
from vitrim.surgery.edits import Edit, apply_, edit_of, reshape_, transform
from vitrim.surgery.fips import ToFips
from vitrim.surgery.int8 import ToInt8
from vitrim.surgery.keep_head_dims import KeepHeadDims
from vitrim.surgery.keep_heads import KeepHeads
from vitrim.surgery.keep_padded_dims import KeepPaddedDims
from vitrim.surgery.keep_tokens import KeepTokens
from vitrim.surgery.keep_units import KeepUnits
from vitrim.surgery.low_rank import ToLowRank
from vitrim.surgery.merge_tokens import MergeTokens
from vitrim.surgery.mixed_heads import mix_heads, turned
from vitrim.surgery.modules import (
    channels_last,
    hidden_and_output,
    mlp_output,
    read_weights,
    site_weights,
    submodule,
    weight_of,
)
from vitrim.surgery.moefication import ToMoefication
from vitrim.surgery.plan import Plan
from vitrim.surgery.recursive import ToRecursive
from vitrim.surgery.replace_activation import ReplaceActivation
from vitrim.surgery.top_k import TopKActivation
from vitrim.surgery.verify_site import noises, verify_site

__all__ = [
    "DropBlocks",
    "Edit",
    "KeepHeadDims",
    "KeepHeads",
    "KeepPaddedDims",
    "KeepTokens",
    "KeepUnits",
    "MergeTokens",
    "Plan",
    "ReplaceActivation",
    "ToFips",
    "ToInt8",
    "ToLowRank",
    "ToMoefication",
    "ToRecursive",
    "TopKActivation",
    "apply_",
    "channels_last",
    "edit_of",
    "hidden_and_output",
    "mix_heads",
    "mlp_output",
    "noises",
    "read_weights",
    "reshape_",
    "site_weights",
    "submodule",
    "transform",
    "turned",
    "verify_site",
    "weight_of",
]
