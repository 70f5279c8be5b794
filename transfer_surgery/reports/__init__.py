"""What has been transferred, as tables, histories and pictures."""

from transfer_surgery.reports.history import History
from transfer_surgery.reports.plots import figure_of, plot_match
from transfer_surgery.reports.table import columns
from transfer_surgery.reports.transfer_report import report

__all__ = ["History", "columns", "figure_of", "plot_match", "report"]
