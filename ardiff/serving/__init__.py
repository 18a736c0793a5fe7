"""What runs the studio elsewhere than on a desk: the Space, the operator's limits, figures for those who watch it."""
