"""How a host drives the graphs: numpy and a graph runtime, never torch."""
