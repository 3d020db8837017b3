"""The report of a run: one self-contained HTML file, and its parts. Imports no torch."""

from kdnas.report.page import write_report as write_report
