"""MLX lives here: a `.squizd` file becomes an mlx-lm model whose experts are paged.

Imports point one way: load → {build, probe, budget, switch} → pager → {policy, io} → container.
`policy`, `profile`, `simulation`, `io` and `pager` know no MLX.
"""
