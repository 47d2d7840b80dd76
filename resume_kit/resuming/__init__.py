"""The staged proof: elect, preflight, load, prove, gate, replay audit."""
