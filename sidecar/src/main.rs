fn main() -> std::process::ExitCode {
    spokeguard::cli::main()
}
