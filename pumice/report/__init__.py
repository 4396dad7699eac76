"""The report of a library as a web page: what was gained and lost, where, and why.

``data`` measures and collects, ``page`` puts the sections together; nothing that compiling needs is imported.
"""

from pumice.report.data import Report, Request, make_report
from pumice.report.page import format_page

__all__ = ["Report", "Request", "format_page", "make_report"]
