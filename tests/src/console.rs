// SPDX-License-Identifier: GPL-2.0-only

//! Reads a machine's console for complaints of its kernel.

/// Lines of context shown after a complaint.
const CONTEXT_LINES: usize = 45;

/// A line is a complaint when it holds all parts of one of these.
const COMPLAINTS: &[&[&str]] = &[
    &["WARNING:"],
    &["BUG:"],
    &["kernel BUG at"],
    &["Oops"],
    &["KASAN"],
    &["UBSAN"],
    &["KFENCE"],
    &["ODEBUG"],
    &["Kernel panic"],
    &["panicked at"],
    &["general protection fault"],
    &["possible circular locking"],
    &["possible recursive locking"],
    &["possible deadlock"],
    &["inconsistent lock state"],
    &["lock held when returning to user space"],
    &["bad unlock balance"],
    &["held lock freed"],
    &["trying to register non-static key"],
    &["DEBUG_LOCKS_WARN_ON"],
    &["suspicious RCU usage"],
    &["scheduling while atomic"],
    &["sleeping function called from invalid context"],
    &["INFO: task ", "blocked"],
    &["soft lockup"],
    &["hard LOCKUP"],
    &["rcu", "detected", "stall"],
    &["rcu", "expedited stall"],
    &["workqueue lockup"],
    &["unreferenced object"],
    &["new suspected memory leaks"],
    &["list_add corruption"],
    &["list_del corruption"],
    &["refcount_t:"],
    &["Bad page state"],
    &["page allocation failure"],
    &["Objects remaining"],
    &["cannot create duplicate filename"],
    &["kobject_add_internal failed"],
    &["invoked oom-killer"],
];

/// A complaint of the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The line that gave it away.
    pub line: String,
    /// That line and what came after it.
    pub excerpt: String,
}

/// Finds the complaints in a console's text, leaving out lines that hold one of the `allowed` texts.
pub(crate) fn problems(text: &str, allowed: &[String]) -> Vec<Problem> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    let mut quiet_until = 0;
    for (index, line) in lines.iter().enumerate() {
        if index < quiet_until
            || !is_complaint(line)
            || allowed.iter().any(|text| line.contains(text.as_str()))
        {
            continue;
        }
        let end = (index + CONTEXT_LINES).min(lines.len());
        quiet_until = end;
        found.push(Problem {
            line: (*line).to_owned(),
            excerpt: lines[index..end].join("\n"),
        });
    }
    found
}

fn is_complaint(line: &str) -> bool {
    COMPLAINTS
        .iter()
        .any(|parts| parts.iter().all(|part| line.contains(part)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines_found(text: &str, allowed: &[&str]) -> usize {
        let allowed: Vec<String> = allowed.iter().map(|&text| text.to_owned()).collect();
        problems(text, &allowed).len()
    }

    #[test]
    fn complaints_are_found() {
        for line in [
            "[    3.1] WARNING: CPU: 0 PID: 1 at block/bio.c:1 x+0x1/0x2 [dtloop]",
            "BUG: KASAN: slab-use-after-free in x",
            "WARNING: possible circular locking dependency detected",
            "INFO: task fio:123 blocked for more than 60 seconds.",
            "rcu: INFO: rcu_preempt self-detected stall on CPU",
            "unreferenced object 0xffff888003a5b000 (size 256):",
            "kmemleak: 1 new suspected memory leaks (see /sys/kernel/debug/kmemleak)",
            "rust_kernel: panicked at kmod/ring.rs:12:5:",
        ] {
            assert_eq!(
                lines_found(&format!("fine\n{line}\nrest\n"), &[]),
                1,
                "{line}"
            );
        }
    }

    #[test]
    fn usual_lines_are_not_complaints() {
        let text = "kasan: KernelAddressSanitizer initialized\n\
                    Command line: oops=panic hung_task rcupdate.rcu_cpu_stall_timeout=60\n\
                    rcu: Hierarchical RCU implementation.\n\
                    Lock dependency validator: Copyright (c) 2006\n";
        assert_eq!(lines_found(text, &[]), 0);
    }

    #[test]
    fn only_what_is_allowed_is_passed_over() {
        assert_eq!(lines_found("WARNING: one\nWARNING: two\n", &["one"]), 1);
    }

    #[test]
    fn one_stack_dump_is_one_problem() {
        let found = problems("a\nBUG: x\nWARNING: y\nz\n", &[]);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].excerpt, "BUG: x\nWARNING: y\nz");
    }
}
