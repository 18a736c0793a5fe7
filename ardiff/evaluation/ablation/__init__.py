"""The ablation: one small model trained at equal compute in every way that the paper compares, and measured alike.

One factor at a time is changed from a base (FoPP, causal, x0): the law of the training timesteps, attention to later
frames, and what is predicted. Every configuration is trained with several seeds; a seed fixes the initial weights, the
clips and the noise, so configurations are compared pair by pair. Training and real clips are encoded once for all runs.

Shapes: B clips, F frames, L tokens per frame, C latent channels, D features.
"""
