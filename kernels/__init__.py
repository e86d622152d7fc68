"""Fast layers for spatial broadcast decoders. See `kernels/broadcast_conv.py`."""

from .broadcast_conv import SpatialBroadcastConv2d, broadcast_conv2d, coordinates

__all__ = ["SpatialBroadcastConv2d", "broadcast_conv2d", "coordinates"]
