"""Schedules as the frameworks take them: functions of the number of optimizer steps."""

from functools import partial

from transfer_surgery import TransferSchedule

half = partial(TransferSchedule, fraction=0.5)
half_early = partial(TransferSchedule, fraction=0.5, end=0.8)
