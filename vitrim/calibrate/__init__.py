"""Run calibration images through a model block by block, and sum up each MLP's activations and wanted outputs."""

from vitrim.calibrate.gradients import final_metrics
from vitrim.calibrate.heads import HeadVisit
from vitrim.calibrate.model_view import LiveModelView
from vitrim.calibrate.runs import num_held_out
from vitrim.calibrate.walk import SiteVisit, Tokens, layer_scale, walk

__all__ = ["HeadVisit", "LiveModelView", "SiteVisit", "Tokens", "final_metrics", "layer_scale", "num_held_out", "walk"]
