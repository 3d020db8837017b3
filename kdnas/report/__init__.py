"""The report of a run: one HTML file that needs nothing beside itself, and the pieces it is made of. No torch here."""

from markupsafe import Markup as Markup

from kdnas.report.axis import Axis as Axis
from kdnas.report.charts import Point as Point
from kdnas.report.charts import bars as bars
from kdnas.report.charts import curves as curves
from kdnas.report.charts import heat_map as heat_map
from kdnas.report.charts import scatter as scatter
from kdnas.report.comparison import write_comparison as write_comparison
from kdnas.report.drawing import drawing as drawing
from kdnas.report.markup import Column as Column
from kdnas.report.markup import table as table
from kdnas.report.page import write_report as write_report
