"""A whole model packed into few bits, and made ready for training.

How a weight is packed stands in ``quant/``, how it multiplies in ``linear/``. Read ``quantize_model.py`` first.
"""
