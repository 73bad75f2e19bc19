// SPDX-License-Identifier: GPL-2.0-only

//! Stories played on test machines. One file per subject; `tests/README.md` says how to write and run one.

mod assurance;
mod boot;
mod command_refusals;
mod entries;
mod fault_clock;
mod fault_disks;
mod fault_frame;
mod fault_kills;
mod fault_log_writes;
mod fault_network;
mod fault_power;
mod fault_resync;
mod module_faults;
mod module_intent;
mod module_life;
mod module_memory;
mod module_ops;
mod module_order;
mod module_parity;
mod module_rig;
mod module_ring;
mod module_smoke;
mod network;
mod replication_faults;
mod replication_files;
mod replication_mirror;
mod replication_queue;
mod replication_recovery;
mod replication_refusals;
mod replication_resync;
mod replication_rig;
mod replication_shaping;
mod replication_staging;
mod sets_database;
mod sets_isolation;
mod sets_order;
mod trust;
