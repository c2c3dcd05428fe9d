"""Live updates: new weights reach modules that serve, in buckets, and become live all at once."""

from refitkit.live.receiver import ReceiverStatus, WeightReceiver
from refitkit.live.update import digest_of_bytes

__all__ = ["ReceiverStatus", "WeightReceiver", "digest_of_bytes"]
