"""Mixtures of experts: many small layers, of which a router chooses a few for each token.

Read in this order: routes, layers, grouped, known, routers, forwards, hook.
"""
