"""What a network is, costs and sees."""

from jaxcnn.analysis.network import Summary, summary, table
from jaxcnn.analysis.rows import Row

__all__ = ["Row", "Summary", "summary", "table"]
