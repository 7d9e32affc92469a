"""All compression methods, one file per paper; importing this package registers them."""

from vitrim.methods.amp import Amp
from vitrim.methods.corp import Corp
from vitrim.methods.dgmr import Dgmr, DgmrPaper
from vitrim.methods.fips import Fips
from vitrim.methods.int8 import Int8
from vitrim.methods.low_rank import Lortsar, LowRank
from vitrim.methods.magnitude import Magnitude
from vitrim.methods.moefication import Moefication
from vitrim.methods.random_units import Random
from vitrim.methods.registry import METHODS, Method, ModelMethod, SiteMethod, find_method, make_method, register
from vitrim.methods.relufy import Relufy
from vitrim.methods.subspace_node import SubspaceNode
from vitrim.methods.taylor import Taylor
from vitrim.methods.top_k import TopK
from vitrim.methods.torch_pruning import TorchPruning

__all__ = [
    "METHODS",
    "Amp",
    "Corp",
    "Dgmr",
    "DgmrPaper",
    "Fips",
    "Int8",
    "Lortsar",
    "LowRank",
    "Magnitude",
    "Method",
    "ModelMethod",
    "Moefication",
    "Random",
    "Relufy",
    "SiteMethod",
    "SubspaceNode",
    "Taylor",
    "TopK",
    "TorchPruning",
    "find_method",
    "make_method",
    "register",
]
