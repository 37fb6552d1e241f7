"""Networks: encoders phi, heads h_theta, and the head that grows by plasticity injection."""
