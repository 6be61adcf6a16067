"""What a person looks at after a purification: a table, a page, a picture, and the files of the result."""

from maskops.report._folder import is_empty, results_folder
from maskops.report._picture import picture
from maskops.report._tables import cost, measured, table, versions
from maskops.report._warnings import heard_warnings
from maskops.report._write import write

__all__ = ["cost", "heard_warnings", "is_empty", "measured", "picture", "results_folder", "table", "versions", "write"]
