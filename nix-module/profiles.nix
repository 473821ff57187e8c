# Opt-in habits: a small spoke that keeps two generations, and the hub that its fleet comes to.
{ config, lib, ... }:
let
  cfg = config.services.spokeguard;
  inherit (lib) mkDefault mkIf;
  net = import ./addresses.nix { inherit lib; };
  nixEnv = lib.getExe' config.nix.package "nix-env";
in
{
  config = lib.mkMerge [
    (mkIf (cfg.enable && cfg.profile == "spoke") {
      services.spokeguard.settings.node.role = mkDefault "spoke";

      boot.loader.grub.configurationLimit = mkDefault 2;
      boot.loader.systemd-boot.configurationLimit = mkDefault 2;
      boot.loader.generic-extlinux-compatible.configurationLimit = mkDefault 2;

      # Where there is no Nix, nothing has to be collected.
      nix.gc.automatic = mkDefault config.nix.enable;
      nix.gc.dates = mkDefault "weekly";
      # A boot menu of two entries still keeps every generation in the store.
      systemd.services.nix-gc.serviceConfig.ExecStartPre = mkIf config.nix.gc.automatic [
        "${nixEnv} --profile /nix/var/nix/profiles/system --delete-generations +2"
      ];
    })

    (mkIf (cfg.enable && cfg.profile == "hub") {
      services.spokeguard.settings.node.role = mkDefault "hub";

      # Its own default is every address, which the bind guard refuses.
      services.prometheus.listenAddress = mkDefault "127.0.0.1";
      services.prometheus.scrapeConfigs = mkIf (cfg.hub.spokes != { }) [
        {
          job_name = "spokeguard";
          static_configs = lib.mapAttrsToList (name: spoke: {
            targets = [
              "${net.bracketed (builtins.head spoke.address)}:${toString cfg.settings.metrics.port}"
            ];
            labels.node = name;
          }) cfg.hub.spokes;
        }
      ];
    })
  ];
}
