"""All compression methods, one file per paper; importing this package registers them."""

from vitrim.methods.amp import Amp
from vitrim.methods.corp import Corp
from vitrim.methods.dgmr import Dgmr, DgmrPaper
from vitrim.methods.fips import Fips
from vitrim.methods.grail import Grail
from vitrim.methods.int8 import Int8
from vitrim.methods.lora_prune import LoraPrune
from vitrim.methods.lortsar import Lortsar
from vitrim.methods.low_rank import LowRank
from vitrim.methods.magnitude import Magnitude
from vitrim.methods.moefication import Moefication
from vitrim.methods.patch_slimming import PatchSlimming
from vitrim.methods.random_units import Random
from vitrim.methods.recursive import Recursive
from vitrim.methods.registry import METHODS, Method, ModelMethod, SiteMethod, find_method, make_method, register
from vitrim.methods.relufy import Relufy
from vitrim.methods.replace_me import ReplaceMe
from vitrim.methods.subspace_node import SubspaceNode
from vitrim.methods.taylor import Taylor
from vitrim.methods.tome import Tome
from vitrim.methods.top_k import TopK
from vitrim.methods.torch_pruning import TorchPruning
from vitrim.methods.vbp import Vbp

__all__ = [
    "METHODS",
    "Amp",
    "Corp",
    "Dgmr",
    "DgmrPaper",
    "Fips",
    "Grail",
    "Int8",
    "LoraPrune",
    "Lortsar",
    "LowRank",
    "Magnitude",
    "Method",
    "ModelMethod",
    "Moefication",
    "PatchSlimming",
    "Random",
    "Recursive",
    "Relufy",
    "ReplaceMe",
    "SiteMethod",
    "SubspaceNode",
    "Taylor",
    "Tome",
    "TopK",
    "TorchPruning",
    "Vbp",
    "find_method",
    "make_method",
    "register",
]
