"""The only writer of modules: the kinds of edit, one file each, and what carries them out. Importing knows them all."""

from vitrim.surgery.confirm import confirm_site
from vitrim.surgery.edits import Edit, apply_, edit_of, reshape_, transform
from vitrim.surgery.factorize import Factorize
from vitrim.surgery.keep_head_dims import KeepHeadDims
from vitrim.surgery.keep_units import KeepUnits
from vitrim.surgery.modules import mlp_output, read_weights, site_weights, submodule, weight_of
from vitrim.surgery.plan import Plan
from vitrim.surgery.quantize import Quantize
from vitrim.surgery.replace_activation import ReplaceActivation
from vitrim.surgery.share_basis import ShareBasis
from vitrim.surgery.split_experts import SplitExperts
from vitrim.surgery.top_k import TopKActivation

__all__ = [
    "Edit",
    "Factorize",
    "KeepHeadDims",
    "KeepUnits",
    "Plan",
    "Quantize",
    "ReplaceActivation",
    "ShareBasis",
    "SplitExperts",
    "TopKActivation",
    "apply_",
    "confirm_site",
    "edit_of",
    "mlp_output",
    "read_weights",
    "reshape_",
    "site_weights",
    "submodule",
    "transform",
    "weight_of",
]
