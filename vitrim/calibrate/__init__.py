"""One pass over calibration images, block by block: what each MLP sees and should put out."""

from vitrim.calibrate.walk import SiteVisit, Tokens, layer_scale, walk
from vitrim.calibrate.workbench import Workbench

__all__ = ["SiteVisit", "Tokens", "Workbench", "layer_scale", "walk"]
