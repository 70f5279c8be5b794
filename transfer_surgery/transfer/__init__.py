"""Move the gates while the user's own optimizer trains."""

from transfer_surgery.transfer.controllers import ScheduleEndedWarning, TransferRestartedWarning
from transfer_surgery.transfer.frozen_gates import FrozenGatesWarning
from transfer_surgery.transfer.optimizer import pause_transfer, resume_transfer, wrap_optimizer
from transfer_surgery.transfer.projection import project, settle
from transfer_surgery.transfer.risk import structural_risk
from transfer_surgery.transfer.schedule import TransferSchedule
from transfer_surgery.transfer.step_hooks import STEP

__all__ = [
    "STEP",
    "FrozenGatesWarning",
    "ScheduleEndedWarning",
    "TransferRestartedWarning",
    "TransferSchedule",
    "pause_transfer",
    "project",
    "resume_transfer",
    "settle",
    "structural_risk",
    "wrap_optimizer",
]
