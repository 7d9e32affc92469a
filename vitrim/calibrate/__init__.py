"""One pass over calibration images, block by block: what each MLP sees and should put out."""

from vitrim.calibrate.model_view import LiveModelView
from vitrim.calibrate.walk import SiteVisit, Tokens, layer_scale, walk

__all__ = ["LiveModelView", "SiteVisit", "Tokens", "layer_scale", "walk"]
