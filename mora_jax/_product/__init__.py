"""The adapted product, `x @ (W + delta)`: placements, gradient rule, cost model, DoRA."""
