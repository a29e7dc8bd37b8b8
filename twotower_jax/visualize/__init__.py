"""Pictures of generation: a trace as a page, an animation and charts, and a sweep as a plot."""
