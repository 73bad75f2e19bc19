// SPDX-License-Identifier: GPL-2.0-only

//! DTLOOP: block devices `/dev/loop<N>` whose every change is captured, in order, for replication.

#[allow(
    unreachable_pub,
    reason = "userspace compiles the same file as a public module"
)]
mod abi;
mod change;
mod consumer;
mod control;
mod device;
#[allow(dead_code, reason = "the host tests ask more of it than the module")]
mod dirty;
mod ffi;
#[allow(dead_code, reason = "the host tests ask more of it than the module")]
mod gate;
mod intent;
mod intent_layout;
mod intent_store;
mod registry;
#[allow(dead_code, reason = "the host tests ask more of it than the module")]
mod ring;
mod stream;
mod sync;

use kernel::{miscdevice::MiscDeviceRegistration, prelude::*};

module! {
    type: Dtloop,
    name: "dtloop",
    authors: ["The DTLOOP developers"],
    description: "Loop block devices with an ordered capture stream for replication",
    license: "GPL v2",
    params: {
        auto_first: i32 {
            default: 100,
            description: "First loop number that 'auto' hands out; high, so that the stock loop driver's search from 0 up stays clear of it (0..1048575, default 100)",
        },
    },
}

/// The loaded module. Its parts go in the order of the fields.
#[pin_data]
struct Dtloop {
    #[pin]
    _control: MiscDeviceRegistration<control::ControlFile>,
    _tables: registry::InUse,
    _work: ffi::work::WorkQueues,
}

impl kernel::InPlaceModule for Dtloop {
    fn init(_module: &'static ThisModule) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            _work: {
                ffi::global::init();
                ffi::work::WorkQueues::new()?
            },
            _tables: registry::start(*module_parameters::auto_first.value_ref())?,
            _control <- MiscDeviceRegistration::register(control::options()),
        })
    }
}
