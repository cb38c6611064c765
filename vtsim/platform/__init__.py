"""The machine in time: the clock, timers, devices and interrupt wires, on SimPy."""
