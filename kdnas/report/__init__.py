"""The report of a run or of several: one self-contained HTML file, and its parts. Imports no torch."""

from kdnas.report.page import write_report as write_report
from kdnas.report.side_by_side import write_side_by_side as write_side_by_side
