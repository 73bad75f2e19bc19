// SPDX-License-Identifier: GPL-2.0-only

//! Exit codes.

use std::process::ExitCode;

use dtloop_api::{ClientError, FailureCode};

use dtloop_manage::preflight::Refusals;

/// The table in `--help`; kept in step with [`Code`] by a test.
pub(crate) const HELP: &str = "\
Exit codes:
  0    done
  1    failed
  2    the command line is wrong
  3    source and target differ, a device is not in sync, or a target is not connected
  4    the time given is over
  5    the dtloop module is not loaded
  6    the agent does not run
  7    refused, nothing was changed
  8    no permission
  9    done for some of the entries, not for all
  130  interrupted";

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Code {
    Done,
    Failed,
    Usage,
    Differs,
    TimedOut,
    NoModule,
    NoAgent,
    Refused,
    NoPermission,
    Partly,
    Interrupted,
}

/// A command line that clap takes but that makes no sense on this machine.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Usage(pub(crate) String);

impl Code {
    pub(crate) const fn number(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Failed => 1,
            Self::Usage => 2,
            Self::Differs => 3,
            Self::TimedOut => 4,
            Self::NoModule => 5,
            Self::NoAgent => 6,
            Self::Refused => 7,
            Self::NoPermission => 8,
            Self::Partly => 9,
            Self::Interrupted => 130,
        }
    }

    /// The exit code of an error.
    pub(crate) fn of(error: &anyhow::Error) -> Self {
        if let Some(error) = error.downcast_ref::<dtloop_abi::Error>() {
            return Self::of_kernel(error);
        }
        if let Some(error) = error.downcast_ref::<ClientError>() {
            return Self::of_agent(error);
        }
        if error.is::<Refusals>() {
            return Self::Refused;
        }
        if error.is::<Usage>() {
            return Self::Usage;
        }
        let mut causes = error.chain();
        match causes.find_map(|cause| cause.downcast_ref::<std::io::Error>()) {
            Some(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
                Self::NoPermission
            }
            _ => Self::Failed,
        }
    }

    const fn of_kernel(error: &dtloop_abi::Error) -> Self {
        use dtloop_abi::Error;
        match error {
            Error::NoModule => Self::NoModule,
            Error::NoPermission { .. } => Self::NoPermission,
            Error::BadName { .. } | Error::BadNumber { .. } => Self::Usage,
            Error::Refused { .. } => Self::Refused,
            _ => Self::Failed,
        }
    }

    pub(crate) const fn of_agent(error: &ClientError) -> Self {
        match error {
            ClientError::NoAgent { .. } => Self::NoAgent,
            ClientError::NoPermission { .. } => Self::NoPermission,
            ClientError::Failed(failure) => match failure.code {
                FailureCode::TimedOut => Self::TimedOut,
                FailureCode::BadRequest => Self::Usage,
                FailureCode::UnknownSet
                | FailureCode::UnknownDevice
                | FailureCode::Busy
                | FailureCode::NothingToDo
                | FailureCode::TargetRefused => Self::Refused,
                _ => Self::Failed,
            },
            _ => Self::Failed,
        }
    }
}

impl From<Code> for ExitCode {
    fn from(code: Code) -> Self {
        code.number().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Code; 11] = [
        Code::Done,
        Code::Failed,
        Code::Usage,
        Code::Differs,
        Code::TimedOut,
        Code::NoModule,
        Code::NoAgent,
        Code::Refused,
        Code::NoPermission,
        Code::Partly,
        Code::Interrupted,
    ];

    #[test]
    fn the_help_lists_every_code() {
        let listed: Vec<u8> = HELP
            .lines()
            .skip(1)
            .map(|line| line.split_whitespace().next().unwrap().parse().unwrap())
            .collect();
        assert_eq!(listed, ALL.map(Code::number));
    }

    #[test]
    fn errors_have_their_codes() {
        let code = |error: anyhow::Error| Code::of(&error);
        assert_eq!(code(dtloop_abi::Error::NoModule.into()), Code::NoModule);
        assert_eq!(code(Usage("x".into()).into()), Code::Usage);
        let timed_out = dtloop_api::Failure::new(FailureCode::TimedOut, "late");
        assert_eq!(code(ClientError::Failed(timed_out).into()), Code::TimedOut);
        let bad = dtloop_api::Failure::new(FailureCode::BadRequest, "no rate");
        assert_eq!(code(ClientError::Failed(bad).into()), Code::Usage);
        assert_eq!(code(anyhow::anyhow!("x")), Code::Failed);
        let context = anyhow::Error::from(dtloop_abi::Error::NoModule).context("attaching");
        assert_eq!(code(context), Code::NoModule);
    }
}
