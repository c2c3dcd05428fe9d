"""Live updates: new weights reach modules that serve, in buckets, and become live all at once."""

from refitkit.live.receiver import ReceiverStatus, WeightReceiver

__all__ = ["ReceiverStatus", "WeightReceiver"]
