"""What has been transferred, as tables, histories and pictures."""

from transfer_surgery.reports.activation_plot import plot_activation
from transfer_surgery.reports.axes import COLOURS, figure_of
from transfer_surgery.reports.history import History
from transfer_surgery.reports.history_plot import plot_history
from transfer_surgery.reports.plots import plot_gates, plot_match, plot_report
from transfer_surgery.reports.transfer_report import Report, ReportRow, report

__all__ = [
    "COLOURS",
    "History",
    "Report",
    "ReportRow",
    "figure_of",
    "plot_activation",
    "plot_gates",
    "plot_history",
    "plot_match",
    "plot_report",
    "report",
]
