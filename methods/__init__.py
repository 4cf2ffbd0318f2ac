"""List what can be optimised: one table of objectives, and the losses SimPO is compared with."""
