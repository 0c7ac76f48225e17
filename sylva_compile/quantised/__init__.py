"""Quantised weights: the formats that blocks can train in, and a linear layer with blocks in such a weight."""
