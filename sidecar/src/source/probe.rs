//! Sweeps this host from the outside in.
