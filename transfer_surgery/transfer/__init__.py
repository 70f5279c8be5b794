"""Move the gates while the user's own optimizer trains."""

from transfer_surgery.transfer.controllers import ScheduleEndedWarning, TransferRestartedWarning
from transfer_surgery.transfer.frozen_gates import FrozenGatesWarning
from transfer_surgery.transfer.optimizer import pause_transfer, resume_transfer, wrap_optimizer
from transfer_surgery.transfer.param_groups import STEP
from transfer_surgery.transfer.projection import move_to_ends, project
from transfer_surgery.transfer.risk import structural_risk
from transfer_surgery.transfer.schedule import TransferSchedule
from transfer_surgery.transfer.wrapped_optimizers import tell_schedules

__all__ = [
    "STEP",
    "FrozenGatesWarning",
    "ScheduleEndedWarning",
    "TransferRestartedWarning",
    "TransferSchedule",
    "move_to_ends",
    "pause_transfer",
    "project",
    "resume_transfer",
    "structural_risk",
    "tell_schedules",
    "wrap_optimizer",
]
