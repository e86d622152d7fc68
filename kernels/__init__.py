"""Fast layers for spatial broadcast decoders. See `kernels/broadcast_conv.py` and `kernels/same_conv.py`."""

from .broadcast_conv import SpatialBroadcastConv2d, broadcast_conv2d, coordinates
from .same_conv import same_conv2d

__all__ = ["SpatialBroadcastConv2d", "broadcast_conv2d", "coordinates", "same_conv2d"]
