"""A network in, its layers and the channels that shrink together out."""

from autocompress.trace.coupling import Slot
from autocompress.trace.surgery import Kept, keep_first, mask, shrink
from autocompress.trace.tracer import Trace, measure, trace

__all__ = ["Kept", "Slot", "Trace", "keep_first", "mask", "measure", "shrink", "trace"]
