"""Unit scaling and u-muP: train small, keep the learning rate, train large.

layers, functional, losses   operations whose outputs and gradients have RMS 1 before training
rule, table                  what each parameter's role makes of its learning rate, and why
param_groups                 the table as a handful of groups, for any optimizer
check_*                      whether a model does what the table promises, in numbers
"""

from mixprec.umup import functional, layers, losses, scaling
from mixprec.umup.checks.coordinates import check_coordinates
from mixprec.umup.checks.drift import DriftMonitor
from mixprec.umup.checks.scales import check_scales
from mixprec.umup.checks.transfer import check_transfer
from mixprec.umup.convert import apply, export
from mixprec.umup.decoder import Decoder
from mixprec.umup.groups import param_groups
from mixprec.umup.roles import ROLES, Spec, spec
from mixprec.umup.rules import rule
from mixprec.umup.scaling import scale_bwd, scale_fwd
from mixprec.umup.spectral import spectral_normalize
from mixprec.umup.table import table
from mixprec.umup.unit_loss import unit_loss

__all__ = [
    "ROLES",
    "Decoder",
    "DriftMonitor",
    "Spec",
    "apply",
    "check_coordinates",
    "check_scales",
    "check_transfer",
    "export",
    "functional",
    "layers",
    "losses",
    "param_groups",
    "rule",
    "scale_bwd",
    "scale_fwd",
    "scaling",
    "spec",
    "spectral_normalize",
    "table",
    "unit_loss",
]
