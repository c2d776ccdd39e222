"""NVFlare components: an aggregator around any rule or central plan, and a filter for clients that fails closed."""

from privfm.plugins.nvflare.aggregator import RobustAggregator, RoundReport
from privfm.plugins.nvflare.privacy_filter import PrivacyFilter, UpdateDecoder

__all__ = ["PrivacyFilter", "RobustAggregator", "RoundReport", "UpdateDecoder"]
