"""The backend ``tensorrt_network``: engines of TensorRT-RTX, ahead of time, without a GPU."""
